"""`python -m astro_dist`: what a submitted job runs."""

from astro_dist.cli import main

if __name__ == "__main__":
    main()
