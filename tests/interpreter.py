"""Triton's interpreter without the work that it repeats."""

import functools


def patch_once_a_launch():
    """Has the interpreter replace the functions of `triton.language` once a launch.

    It does so again at each call of a device function within the launch, where it finds nothing
    left to replace: that search takes nearly half of the time of a kernel. What device functions
    of other modules replaced is put back with the launch's, too; Triton leaves it, so that nothing
    can be compiled in this process any more.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # of Triton 3.6 to 3.9
        return
    patch, scope_of = interpreter._patch_lang, interpreter._LangPatchScope
    patched, scopes = set(), []

    class Scope(scope_of):
        def restore(self):  # called of the scope of a launch alone
            while scopes:
                scope_of.restore(scopes.pop())
            patched.clear()

    @functools.cache
    def modules(function):
        values = function.__globals__.values()
        return {x for x in (language, language.core) if any(value is x for value in values)}

    def patch_what_is_not(function):
        new = modules(function) - patched
        if not new:
            return Scope()
        patched.update(new)
        scopes.append(patch(function))
        return scopes[-1]

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_what_is_not
