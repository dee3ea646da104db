"""Distillation: a smaller student learns from a teacher's predictions and from the labels."""
