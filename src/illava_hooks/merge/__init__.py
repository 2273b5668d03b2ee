"""Pure tensor functions: score tokens, decide who is merged, apply the decision. They know no model."""
