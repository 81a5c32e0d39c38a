"""Facts of a trained model that are in no weight: one value each, with its origin."""
