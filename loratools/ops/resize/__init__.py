"""resize: give an adapter another rank."""
