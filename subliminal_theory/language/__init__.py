"""Language models: the third size of the experiment."""
