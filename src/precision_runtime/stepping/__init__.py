"""What happens to an optimizer's step: master weights, wide copies, rounding, what was lost, gates."""
