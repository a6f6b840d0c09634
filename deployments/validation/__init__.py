"""A request checked against a model card gives a resolved request; used by both layers."""
