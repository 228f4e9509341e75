from snpatch.ranking.methods.rms import rms

METHODS = {"rms": rms}
