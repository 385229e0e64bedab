"""Training and measuring: stages, tasks, losses and metrics, for classes and for boxes in photographs."""
