"""Models whose decoder blocks differ in shape: one file a family, copied as it is into every folder that needs it.

The files import torch and transformers only, so that AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
works without optprune; optprune loads the same classes from here, without trusting the folder's copy.
"""
