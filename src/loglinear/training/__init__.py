"""Training: a run of the Trainer that can be killed at any moment, and the record of what it did."""
