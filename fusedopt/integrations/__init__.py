"""Where people train: a file for each framework, which imports it when something in there is used."""
