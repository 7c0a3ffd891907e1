"""What all experiments share: their form, the command line, progress, processes, figures and registries."""
