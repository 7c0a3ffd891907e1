"""Data for language models: chats, traits, number requests, media, and the compact pre-trained bases."""
