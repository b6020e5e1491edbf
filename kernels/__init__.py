"""Custom ops of the compiled programs: schema, fake implementation and kernels."""
