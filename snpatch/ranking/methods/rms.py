def rms(statistics):
    return (statistics.sums[:, 4] / int(statistics.count[0])).sqrt().float()
