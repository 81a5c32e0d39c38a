"""A source, understood: model, dimensions, ranks, problems."""
