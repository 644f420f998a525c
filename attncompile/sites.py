"""The log of attention sites: ``TORCH_LOGS=attncompile.sites``.

PyTorch reads ``TORCH_LOGS`` while it is imported, and takes the name of any module for that of a log. It imports a
package for it with all that is in it; of a module it only asks whether there is one, which is what this file is for.
What writes to the log is :func:`attncompile.frontends.torch_logs.site_logger`.
"""
