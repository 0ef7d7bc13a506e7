"""The measures of arXiv 2603.20808 on hidden states of visual tokens, as pure functions of tensors.
They know no model."""
