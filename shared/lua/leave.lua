-- Remove a server's record, unless it is another one's.
-- KEYS[1] record   KEYS[2] servers (set)
-- ARGV[1] its instance   ARGV[2] its id
-- Returns 1 when it is gone, 0 when it is another server's and stays.
local found = redis.call('GET', KEYS[1])
if found then
  local read, record = pcall(cjson.decode, found)
  if read and type(record) == 'table' and type(record.instance) == 'string' and record.instance ~= ARGV[1] then
    return 0
  end
end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
return 1
