"""Distillation: a student with fewer layers learns from a teacher as well as from the labels."""
