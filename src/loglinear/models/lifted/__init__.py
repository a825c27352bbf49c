"""LIFTED: log-linear mixers inside the models of other packages."""
