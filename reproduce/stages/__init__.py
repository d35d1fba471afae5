"""The stages of an experiment, a class for each; what a job runs is one of them."""
