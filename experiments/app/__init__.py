"""What all experiments share: the contract, the command line, progress, workers, figures and registries."""
