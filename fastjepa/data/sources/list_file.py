def list_list_file(files): raise NotImplementedError
