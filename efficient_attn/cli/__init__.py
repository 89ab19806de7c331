"""The command `efficient-attn`: what mechanisms claim, cost and do on this machine. `main.py` is the way in."""
