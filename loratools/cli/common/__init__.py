"""What the commands share: options, output and the error boundary."""
