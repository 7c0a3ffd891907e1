"""Where names of the command line and of the registries become values."""
