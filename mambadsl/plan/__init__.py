"""Floor 4: which layers run in which pipeline stage, in which schedule, and what each stage costs."""
