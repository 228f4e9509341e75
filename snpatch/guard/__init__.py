"""Guards: from the activations of a prompt's last token, before anything is generated, will the answer be harmful?"""
