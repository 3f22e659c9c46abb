"""Efficiency pipelines (Xin et al. 2022): operators in an order, what they give, what they should give, the study."""
