"""The readable definition of correct: complete semantics, any dtype, any device, differentiable any number of times."""
