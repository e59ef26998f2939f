"""Standing questions: asked again and again between frame steps, told when their answers meet a condition."""
