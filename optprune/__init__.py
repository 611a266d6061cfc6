"""optprune: weight pruning of language models as optimisation.

A layer's pruning is a problem object that can be printed, measured, hashed and solved; a solver is anything that
returns a better feasible weight; a model is where problems come from and answers go back to.

Conventions, obeyed everywhere:

- weights are [out, in]; averages are over tokens; x* is the input a layer will really get, x its dense input
- a mask is True where a weight is kept; problems count what they keep, only recipes speak of sparsity
- sparsity is counted over the linear weights of the decoder blocks, without biases, embeddings and norms
- the loss is half the mean squared output error per token plus the damping term; the relative error
  E|V x* - W x|^2 / E|W x|^2 is reported without damping
- products are accumulated in float32 or better with TF32 off; objectives are measured in float64
"""
