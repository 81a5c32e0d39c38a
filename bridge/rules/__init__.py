"""What a family declares: axis equations, names, rules, models."""
