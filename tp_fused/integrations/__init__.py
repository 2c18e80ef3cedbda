"""tp_fused inside other people's models: one module for each library, imported only when asked for."""
