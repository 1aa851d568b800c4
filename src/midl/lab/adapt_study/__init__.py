"""The study behind docs/adapt.md: trained networks adapted to two budgets, beside low rank and the oracle."""
