"""Run folders: train a guide, evaluate it, and keep both so that the score can be reproduced.

:mod:`~pyro_gpvae.runs.config` holds the options of a run and imports nothing heavy;
:mod:`~pyro_gpvae.runs.train` trains and resumes, :mod:`~pyro_gpvae.runs.evaluate` evaluates again,
:mod:`~pyro_gpvae.runs.folder` reads a folder back, and :mod:`~pyro_gpvae.runs.results` reads many
of them as a table. The reports of the commands are made here as well. The packages ``cli`` and
``experiments`` use it, and it uses all packages below them. Nothing is imported here, so that the
command starts quickly.
"""
