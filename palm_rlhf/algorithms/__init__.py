"""Algorithms as rows of a table: an estimator of advantages and an objective, each formula written once."""
