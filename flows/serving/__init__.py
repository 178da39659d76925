"""What the HTTP service is made of: the model in memory, its answers, its guard and its pages."""
