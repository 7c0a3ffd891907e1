"""The compact model's world: chats, traits, number requests, media, and pre-trained bases."""
