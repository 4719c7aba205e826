from astro_dist.publish import publish_run
from astro_dist.config import PublishConfig

def test_first(online_hub, finished):
    entry = publish_run(finished, PublishConfig(repo="org/model"))
    print(entry, online_hub.asked_kinds, online_hub.commits)
    print((finished/"model"/"README.md").read_text())
    assert 0
