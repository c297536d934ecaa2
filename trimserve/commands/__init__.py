"""The commands of `trimserve`, one file each; slow imports are left to the command that needs them."""
