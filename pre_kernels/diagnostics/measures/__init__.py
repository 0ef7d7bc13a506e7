"""What the paper measures on hidden states of visual tokens, as pure functions of tensors
(arXiv 2603.20808). Knows no model."""
