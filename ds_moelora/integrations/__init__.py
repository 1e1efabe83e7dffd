"""What the front ends need that build model, adapter and engine themselves (docs/front_ends.md).

Nothing here is imported by `import ds_moelora`; a module named after a front end imports it, and is named in that front
end's own configuration.
"""
