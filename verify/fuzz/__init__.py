"""Random cases of the loss, and the rule by which each is judged."""
