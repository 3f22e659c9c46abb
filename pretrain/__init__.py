"""Job: text to a multi-exit checkpoint (masked language modelling and sentence order at every exit)."""
