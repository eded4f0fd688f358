"""A diffusers pipeline: opened, adapted, equipped with a guidance method, sampled from, fitted to the memory."""
