"""The small world: captioned vector pictures, and the models that the package carries, made from nothing but this code.

`world` draws pictures, `scorer` reads them back, `ldm` trains the latent source model, `corpus` lets it draw the
training pictures, `transfer` turns it into pixel models, `score` measures them all. Each is a subcommand of
``python -m examples.tiny``.
"""
