"""Load on servers: who is started, what they are asked, and what is noted. The program is serve_bench.py."""
