"""Mixed precision: how many bits each weight tensor and each activation gets under a budget."""
