"""What travels over HTTP: request bodies, answers, errors. Knows nothing about the engine."""
