"""Random cases of the loss, and the rule that judges each."""
